"""Published rules that decide from data, one file each, and what they share."""
