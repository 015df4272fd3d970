"""The reference answers of assignment 5."""
programs_started = 16
programs_without_work = 10
nan_is_seen = {
    "A beyond DEPTH": True,
    "W beyond WIDTH, up": False,
    "A after the group, up": False,
    "Z after the group, da": True,
    "A after the group, dw": True,
}
gets_nothing_from_gate_0 = {"x": True, "w_in": True, "b_out": True, "gate": False}
kept = {"x": True, "z": True, "gelu(z)": False, "raw": False}
bytes_kept_per_token = 3456
ones_in_float16 = 2048
