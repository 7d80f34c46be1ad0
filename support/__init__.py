"""Between the method and its two commands: configs, photo features, answering, run folders, reports."""
