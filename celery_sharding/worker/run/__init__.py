"""What a run is made of: its delivery, its lane, its end."""
