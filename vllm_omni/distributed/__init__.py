"""Several devices for one model: what is split, who decides, and what happens when a rank fails."""
