"""torchrun as a file, so that the tests start it with this very interpreter."""

from torch.distributed.run import main

if __name__ == "__main__":
    main()
