"""`python -m distributed …` is `brainsweep …`."""

from distributed.commands.app import main

main()
