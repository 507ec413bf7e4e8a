"""One file a workload: its options, its networks, its losses. The file's name is the registry.

Each file defines `Options` (a WorkloadOptions whose `name` is the file's) and
`build(options, data, optimizer) -> Workload`.
"""
