"""Assignment 5, part F: what does a kernel cost, and what may it skip? Replace every None."""

# F1. T = 37, K = 2, E = 5; tiles of 32 rows and 32 columns; H = 45. How many programs does the
#     launch of "up" start?
programs_started = None

# F2. All 74 choices are expert 3's. How many of these programs find that there is nothing to do?
programs_without_work = None

# F3. On a GPU the masked lanes of a load without other= may hold anything; say NaN. Can a NaN there
#     end up in a number that is stored under its mask? True or False
#     "A beyond DEPTH": lanes of A in columns from DEPTH on, in the last step of the loop
#     "W beyond WIDTH ...": lanes of W in columns from WIDTH on
#     "... the group":  lanes of rows after the last row of the tile's expert
nan_is_seen = {
    "A beyond DEPTH": None,
    "W beyond WIDTH, up": None,
    "A after the group, up": None,
    "Z after the group, da": None,
    "A after the group, dw": None,
}

# F4. A dropped choice has gate 0. Is what that choice adds to these gradients exactly zero for
#     every input? "gate" is that choice's own gate. True or False
gets_nothing_from_gate_0 = {"x": None, "w_in": None, "b_out": None, "gate": None}

# F5. What must `lean` and `fused` keep for their backward? True or False
kept = {"x": None, "z": None, "gelu(z)": None, "raw": None}

# F6. D = 192, H = 768, K = 2, float16: how many bytes per token are the ones of F5 that are kept?
bytes_kept_per_token = None

# F7. A float16 variable starts at 0, and 1 is added to it 4096 times. What does it hold at the end?
ones_in_float16 = None
