"""torchrun as a file, so that tests start it with their own interpreter."""

from torch.distributed.run import main

if __name__ == "__main__":
    main()
