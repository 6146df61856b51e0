"""Ways to ask: ``trainer.influence``, ``InfluenceModule``, and edits through a Trainer."""
