"""`python -m distributed …` is `brainsweep …`."""

from brainsweep import main

main()
