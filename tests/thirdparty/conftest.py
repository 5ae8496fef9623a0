"""The packages in here are foreign: their tests run where they are installed, which `test_third_parties.py` sees to."""

collect_ignore_glob = ["adapterkit_*"]
