"""A hospital's side: one ClientApp that trains on the data that stays there."""
