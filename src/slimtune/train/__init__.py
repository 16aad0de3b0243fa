"""Training: rows to examples with loss masks, and the loop over them."""
