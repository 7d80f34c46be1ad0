"""Below the method and known to every other module: files, weights, progress, and fast forms of the same arithmetic."""
