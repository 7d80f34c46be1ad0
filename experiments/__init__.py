"""The paper's tables, speed and memory, probes, and the tools that tests use:  python -m experiments.NAME --help"""
