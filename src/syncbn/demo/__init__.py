"""What syncbn is for, on real data: three ways to train one small network on handwritten digits.

options.py (what is run) → data.py, network.py, train.py (one rank) → launch.py (its processes)
→ run.py (the three arms) → report.py, picture.py (what they show). Needs the extra ``[demo]``.
"""
