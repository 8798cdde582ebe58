//! Recipes of the catalogue: reading what there is, and building one by running `guest-images/build`. It knows
//! the builder's command line and its `progress:` lines, and nothing of how images are made. `images` calls it.
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;

use model::image::CatalogueEntry;
use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

use super::limits::{
    CATALOGUE_BYTES_MAX, RECIPE_GRACE, RECIPE_LINE_BYTES_MAX, RECIPE_LINES_KEPT, RECIPE_MAX,
};

/// What of a recipe callers see; the builder reads the rest.
#[derive(Deserialize)]
struct Recipe {
    title: String,
    #[serde(default)]
    description: String,
    /// For the project's own use.
    #[serde(default)]
    internal: bool,
}

/// The recipes of `guest_images` that callers may use, in the order of their names.
pub(super) fn catalogue(guest_images: &Path) -> io::Result<Vec<CatalogueEntry>> {
    let mut text = String::new();
    File::open(guest_images.join("catalogue.toml"))?.take(CATALOGUE_BYTES_MAX).read_to_string(&mut text)?;
    let recipes: BTreeMap<String, Recipe> = toml::from_str(&text).map_err(io::Error::other)?;
    let entry = |(name, recipe): (String, Recipe)| {
        let Recipe { title, description, internal } = recipe;
        (!internal).then_some(CatalogueEntry { name, title, description })
    };
    Ok(recipes.into_iter().filter_map(entry).collect())
}

/// Why a recipe was not built.
#[derive(Debug, thiserror::Error)]
pub(super) enum BuildError {
    /// It was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The builder could not be run.
    #[error("cannot run {}", program.display())]
    Run {
        /// The builder.
        program: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// It failed; its last words.
    #[error("{0}")]
    Failed(String),
}

/// The builder's phase and percent, as it last told them.
#[derive(Debug, Default)]
pub(super) struct Stage(Mutex<(String, u8)>);

impl Stage {
    /// Phase and percent.
    pub(super) fn now(&self) -> (String, u8) {
        self.0.lock().map(|stage| stage.clone()).unwrap_or_default()
    }

    fn tell(&self, stage: (String, u8)) {
        if let Ok(mut now) = self.0.lock() {
            *now = stage;
        }
    }
}

/// Builds `recipe` into the directory `out`. The builder and everything it started are in a process group of
/// their own, which is ended when `cancelled` resolves, when the time is over, or when this future is dropped.
pub(super) async fn build(
    guest_images: &Path,
    recipe: &str,
    out: &Path,
    stage: &Stage,
    cancelled: impl Future<Output = ()>,
) -> Result<(), BuildError> {
    let program = guest_images.join("build");
    let run_error = |cause| BuildError::Run { program: program.clone(), cause };
    let mut child = Command::new(&program)
        .arg(recipe)
        .arg("--out")
        .arg(out)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(run_error)?;
    let group = Group(child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw));
    let stderr = child.stderr.take();
    let work = async {
        let last_words = match stderr {
            Some(stderr) => listen(stderr, stage).await,
            None => String::new(),
        };
        (child.wait().await, last_words)
    };
    let outcome = tokio::select! {
        outcome = work => Some(outcome),
        () = cancelled => None,
        () = tokio::time::sleep(RECIPE_MAX) => {
            group.end(&mut child).await;
            return Err(BuildError::Failed(format!("the build took longer than {} s", RECIPE_MAX.as_secs())));
        }
    };
    let Some((status, last_words)) = outcome else {
        group.end(&mut child).await;
        return Err(BuildError::Cancelled);
    };
    // It has ended by itself, and its number may belong to another process from here on.
    group.forget();
    let status = status.map_err(run_error)?;
    if status.success() {
        Ok(())
    } else {
        Err(BuildError::Failed(format!("the build ended with {status}: {last_words}")))
    }
}

/// Follows the builder's lines to their end; the last that are no progress are kept.
async fn listen(output: impl AsyncRead + Unpin, stage: &Stage) -> String {
    let mut output = BufReader::new(output);
    let mut kept = VecDeque::new();
    loop {
        let mut line = Vec::new();
        let read = (&mut output).take(RECIPE_LINE_BYTES_MAX as u64).read_until(b'\n', &mut line).await;
        if !matches!(read, Ok(1..)) {
            return Vec::from(kept).join("\n");
        }
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end();
        match progress(line) {
            Some(now) => stage.tell(now),
            None if line.is_empty() => {}
            None => {
                if kept.len() == RECIPE_LINES_KEPT {
                    kept.pop_front();
                }
                kept.push_back(line.to_owned());
            }
        }
    }
}

/// Reads `progress: <phase> <percent>`.
fn progress(line: &str) -> Option<(String, u8)> {
    let (phase, percent) = line.strip_prefix("progress: ")?.split_once(' ')?;
    let plain = (1..=32).contains(&phase.len())
        && phase.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    let percent: u8 = percent.parse().ok().filter(|percent| *percent <= 100)?;
    plain.then(|| (phase.to_owned(), percent))
}

/// A process group that is killed when it is dropped.
struct Group(Option<Pid>);

impl Group {
    /// Asks the group to end, so that it can clean up, and then makes it.
    async fn end(mut self, child: &mut Child) {
        if let Some(group) = self.0 {
            let _ = kill_process_group(group, Signal::TERM);
            let _ = tokio::time::timeout(RECIPE_GRACE, child.wait()).await;
            let _ = kill_process_group(group, Signal::KILL);
            let _ = child.wait().await;
            self.0 = None;
        }
    }

    fn forget(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests;
