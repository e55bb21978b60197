"""Focus policies, and the allocator that turns scores into edits."""
