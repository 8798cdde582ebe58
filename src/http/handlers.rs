//! One file per noun. A handler reads the request, makes one call to the host and writes the answer.
pub(crate) mod bulk;
pub(crate) mod console;
pub(crate) mod description;
pub(crate) mod events;
pub(crate) mod host;
pub(crate) mod images;
pub(crate) mod metrics;
pub(crate) mod networks;
pub(crate) mod operations;
pub(crate) mod servers;
pub(crate) mod snapshots;
pub(crate) mod volumes;

use crate::call::Removable;

/// The members of this merge patch that null takes back to a default.
pub(crate) fn removable(patch: &str) -> Vec<&'static str> {
    let defaults = match patch {
        "PatchServer" => model::server::PatchServer::DEFAULTS,
        "PatchImage" => model::image::PatchImage::DEFAULTS,
        "PatchVolume" => model::volume::PatchVolume::DEFAULTS,
        "PatchSnapshot" => model::snapshot::PatchSnapshot::DEFAULTS,
        "PatchNetwork" => model::network::PatchNetwork::DEFAULTS,
        _ => &[],
    };
    defaults.iter().map(|(name, _)| *name).collect()
}
