"""`python -m kvcomp.benchmarks.lm_eval`: lm-eval's command, with kvcomp's model and tasks."""

from .model import main

if __name__ == "__main__":
    main()
