"""`python -m distributed …` is `brainsweep …`."""

from distributed.cli import main

main()
