"""Everything before there are weights to ship: data, the starter base, training, merging."""
