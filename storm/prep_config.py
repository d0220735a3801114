"""How slides become stores and stores become shards: the keys of preparation, each with its default."""

from typing import Literal

from pydantic import Field

from storm.config import Section


class PrepConfig(Section):
    """How slides become stores and stores become shards."""

    tile_px: int = Field(default=224, ge=16, le=4096, description="side of a tile in pixels")
    tile_mpp: float = Field(default=0.5, ge=0.05, le=4.0, description="um per tile pixel")
    jpeg_quality: int = Field(default=90, ge=50, le=100)
    min_tissue: float = Field(
        default=0.05, ge=0, le=1, description="tiles with less tissue that no profile reads are left out"
    )
    min_mapped: float = Field(
        default=0.8, ge=0, le=1, description="refuse a measurement of which fewer columns map to Ensembl"
    )
    max_image_mpx: int = Field(
        default=150, ge=1, description="largest whole-image decode (JPEG, PNG, untiled TIFF), megapixels"
    )
    max_tiles: int = Field(default=2_000_000, ge=1, description="refuse a slide whose header asks for more tiles")
    max_px_per_byte: int = Field(
        default=100_000, ge=1, description="refuse a slide whose header tells more pixels per byte of its file"
    )
    max_upsampling: float = Field(
        default=2.0, ge=1, description="refuse a slide whose own pixels are so much coarser than tile_mpp"
    )
    max_failed_tiles: float = Field(
        default=0.01, ge=0, le=1, description="refuse a slide of which a larger share of tiles does not decode"
    )
    aliases: str = Field(default="", description="tsv of a user's gene names: name, Ensembl id or current symbol")
    min_depth: int = Field(default=10, ge=0, description="flag profiles with fewer counts")
    min_genes: int = Field(default=5, ge=0, description="flag profiles with fewer genes")
    max_control_share: float = Field(
        default=0.1, ge=0, le=1, description="flag profiles of whose counts a larger share are controls"
    )
    lattice_residual_px0: float = Field(
        default=2.0, ge=0, description="refuse a lattice fit with a larger rms residual, px"
    )
    lattice_anisotropy: float = Field(
        default=0.01, ge=0, description="refuse a lattice fit whose two mpp differ by more"
    )
    # Legacy ST's pixel positions are the printed spots as somebody saw them, not the ideal lattice: on her2st the rms
    # residual is 11-17 um of a 200 um pitch and the two mpp differ by up to 0.9 %.
    st_residual_um: float = Field(default=30.0, ge=0, description="as lattice_residual_px0, for legacy ST, um")
    st_anisotropy: float = Field(default=0.02, ge=0, description="as lattice_anisotropy, for legacy ST")
    mpp_warn: float = Field(default=0.05, ge=0, description="report mpp sources that differ by more than this share")
    mpp_refuse: float = Field(default=0.25, ge=0, description="refuse above this share unless the manifest gives mpp")
    spots_side: int = Field(default=6, ge=1, description="a region holds about this number of spots squared")
    min_profiles: int = Field(
        default=64, ge=1, description="a group holds at least so many profiles where the slide has them"
    )
    max_profiles: int = Field(default=1024, ge=1, description="of one region in one sample")
    max_group_mb: float = Field(default=4.0, gt=0)
    shard_mb: float = Field(default=100.0, gt=0)
    pool_mb: float = Field(
        default=4000.0, gt=0, description="slides whose groups are mixed in shards come to so much; a task packs a pool"
    )
    withheld_genes: str = Field(
        default="", description="file of Ensembl ids, one a line: genes that shards leave out, to prove unseen ones on"
    )
    split_by: Literal["donor", "section"] = "donor"
    val_share: float = Field(default=0.0, ge=0, lt=1, description="of donors without a split in the manifest")
    test_share: float = Field(default=0.0, ge=0, lt=1, description="of donors without a split in the manifest")
    seed: int = Field(default=0, ge=0)
