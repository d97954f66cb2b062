"""What a live engine leaves behind: its schedule, to be replayed, and its traffic, to be simulated. No JAX.

Neither holds a prompt, or a token: lengths, times, and names of blocks that are equal where texts are.
"""
