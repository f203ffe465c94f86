"""The fault campaign: `python -m profiling.faults`.

Commands of aime_fast are killed, run on full disks, given damaged files and extreme numbers, and started twice in one folder. A file must
be whole and verified, or refused in one line; two jobs never share a folder; whatever ends a process, at most one checkpoint interval is
lost. `campaign.py` is the command, `outcome.py` says how a fault can end, `process.py` starts the commands, `runs.py` tells whether what
they left is right; each other file is one kind of fault. docs/reliability.md has the results.
"""
