"""Another name of `mythos tokenizer`."""

from mythos_dist.commands.train_tokenizer import main
from mythos_dist.errors import run_command

if __name__ == "__main__":
    run_command(main)
