"""Acting on a group: what workers, publishers and operators do to its layout."""
