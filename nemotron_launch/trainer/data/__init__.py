"""From files to token ids: rows, preference pairs, SFT examples, and the order in which training sees them."""
