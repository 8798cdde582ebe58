//! What a crash may have left among the volumes: files without a record, deletions half done.
//! `Volumes::recover` calls it before anything else touches the directory.
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use model::VolumeId;
use model::volume::{FillMethod, Volume, VolumeState};
use rusqlite::Connection;

use super::files::{self, BESIDE, UNFINISHED};
use super::overlay::BACKING;
use crate::config::Dirs;
use crate::error::{Error, Result};
use crate::servers;
use crate::store::records;

/// Removes files that no record names, and answers which volumes are to be purged: those that were being deleted,
/// and those that nobody would go on to fill.
pub(super) fn look(connection: &Connection, dirs: &Dirs) -> Result<Vec<VolumeId>> {
    let volumes: Vec<Volume> = records::all(connection)?;
    // How one was filled that is being made is not in its record yet.
    let is_over = |volume: &Volume| {
        volume.state == VolumeState::Creating || volume.filled_by == Some(FillMethod::Overlay)
    };
    let known = volumes.iter().map(|volume| (volume.id, is_over(volume))).collect();
    let directory = dirs.root().join("volumes");
    remove_strangers(&directory, &known, &servers::returning_volumes(connection)?)
        .map_err(|cause| Error::file(format!("cannot tidy {}", directory.display()), cause))?;
    let doomed =
        volumes.iter().filter(|volume| volume.server_id.is_none() && volume.state != VolumeState::Ready);
    Ok(doomed.map(|volume| volume.id).collect())
}

/// Only names that Toft gives are removed; what else lies there is somebody's and is left. Of those `known` it is said whether they may need
/// another file.
fn remove_strangers(
    directory: &Path,
    known: &BTreeMap<VolumeId, bool>,
    returning: &BTreeSet<VolumeId>,
) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let unfinished = name.strip_suffix(UNFINISHED);
        let finished = unfinished.unwrap_or(name);
        let (beside, backing) = (finished.strip_suffix(BESIDE), finished.strip_suffix(BACKING));
        let own = beside.or(backing).unwrap_or(finished);
        let id = own.strip_suffix(".raw").and_then(|id| id.parse().ok());
        let is_wanted = |id: &VolumeId| match (beside, backing) {
            (Some(_), _) => returning.contains(id),
            (_, Some(_)) => known.get(id) == Some(&true),
            _ => known.contains_key(id),
        };
        if id.is_some_and(|id| unfinished.is_some() || !is_wanted(&id)) {
            files::remove(&entry.path())?;
        }
    }
    Ok(())
}
