"""Everything that depends on Lightning: both class trees, private names, and patches of the user's instance."""
