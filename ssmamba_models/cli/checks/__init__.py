"""What `ssmamba doctor` looks at, one file per subject; none imports torch or timm into this process."""
