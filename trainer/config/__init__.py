"""What a run is and where its settings come from. Imports no torch, since launch/ reads it on login nodes."""
