"""Both paths of a hooked layer in one pass: `W k + b`, `Δ k` and the squares that give `‖Δ k‖`."""
