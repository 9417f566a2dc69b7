"""What a small language model forgets when it is tuned on one kind of text after another."""
