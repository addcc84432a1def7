"""python -m unroll"""

from unroll.cli import main

main()
