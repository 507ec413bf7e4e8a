"""What every generator and discriminator share."""
