"""`python -m mythos_dist`: the command `mythos`, where the console script is not on the PATH."""

from mythos_dist.commands.main import main

if __name__ == "__main__":
    main()
