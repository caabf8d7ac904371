"""Parts of the pulmonary embolism app: translation between MONAI Label and ``pe_app``, no medical decisions."""
