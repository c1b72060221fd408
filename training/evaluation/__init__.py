"""What each task is asked on the sprite world, what counts as right, and how it is summed up."""
