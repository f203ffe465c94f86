"""Control: what an action brings, and policies that act on what the world model knows."""
