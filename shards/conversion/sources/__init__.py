"""Sources of encoded images: LMDBs, folders and tars."""
