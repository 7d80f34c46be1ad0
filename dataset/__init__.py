"""The paper's data sets (section 3, Table 6, Appendix B): built, imported, counted and checked.  python -m dataset --help"""
