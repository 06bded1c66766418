"""Where rows come from: files, GLUE, the hub, the embedded demo task, and samples of them."""
