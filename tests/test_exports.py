import coachhook


def test_every_export_is_there() -> None:
    assert {name for name in coachhook.__all__ if not hasattr(coachhook, name)} == set()
    assert set(coachhook.__all__) <= set(dir(coachhook))
    assert not hasattr(coachhook, "edit_request")
