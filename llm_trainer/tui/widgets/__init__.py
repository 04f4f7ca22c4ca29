"""What the screens are made of: each widget shows one piece of data that its parent hands down."""
