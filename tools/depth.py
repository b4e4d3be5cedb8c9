#!/usr/bin/env python
import sys

if __name__ == "__main__":
    sys.argv[:1] = ["rep-plugin", "depth"]
    from rep_plugin.__main__ import main

    main()
