"""A campaign of faults: killed, starved, damaged and doubled runs, and what is left of them."""
