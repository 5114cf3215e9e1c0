"""`mlxsteer serve`: an engine that decodes many steered answers together, and HTTP around it.

`engine` knows no HTTP; everything else here turns requests into its jobs and its events into
replies. Needs the extra `serve`.
"""
