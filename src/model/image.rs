//! Images: read-only templates that root volumes are made from.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::{ImageId, OperationId};
use crate::name::{Labels, Name};
use crate::time::Time;

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Identity.
    pub id: ImageId,
    /// Unique name.
    pub name: Name,
    /// One line for people, of the image's maker.
    pub title: String,
    /// The caller's own words.
    #[serde(default)]
    pub description: String,
    /// The caller's own pairs.
    #[serde(default)]
    pub labels: Labels,
    /// Whether servers can be made from it.
    pub state: ImageState,
    /// Where it came from.
    pub source: ImageSource,
    /// Processor architecture: `x86_64`.
    pub architecture: String,
    /// Size of its disk in bytes; 0 for an image that runs from its initrd alone.
    pub disk_bytes: u64,
    /// Bytes it takes on the host's disk, as far as known.
    pub stored_bytes: u64,
    /// SHA-256 of the manifest, which names the SHA-256 of every file.
    pub sha256: String,
    /// Least memory a server needs, in bytes.
    pub memory_bytes_min: u64,
    /// User that ssh keys are given to.
    pub default_user: String,
    /// The import in progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation_id: Option<OperationId>,
    /// Version of this resource.
    pub generation: u64,
    /// When it was created.
    pub created_at: Time,
    /// When it last changed.
    pub updated_at: Time,
}

/// Whether an image can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImageState {
    /// Its files are coming in.
    Importing,
    /// Complete and verified.
    Ready,
    /// It is being deleted.
    Deleting,
}

/// Where an image came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ImageSource {
    /// Sent by a caller as a bundle.
    Upload,
    /// A bundle or image directory of this name in the operator's import directory.
    ImportDirectory(String),
    /// A recipe of the catalogue.
    Catalogue(String),
}

/// Body of `POST /v1/images`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportImage {
    /// Unique name.
    pub name: Name,
    /// From where.
    pub source: ImportSource,
    /// SHA-256 the manifest must have, in lower-case hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The caller's own pairs.
    #[serde(default)]
    pub labels: Labels,
}

/// Body of `PATCH /v1/images/{id}`: an RFC 7396 merge patch. Servers keep what they were made from, whatever it is
/// called.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PatchImage {
    /// New name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// New description.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Labels to set; null removes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<std::collections::BTreeMap<String, Option<String>>>,
}

/// Answer to `POST /v1/images?dry_run=true`: what would be imported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImagePlan {
    /// The image as it would be accepted; its id may differ, and its files say the rest when they come in.
    pub image: Image,
    /// Each step, for people.
    pub steps: Vec<String>,
}

/// From where to import. Never a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ImportSource {
    /// An entry of the operator's import directory: one file name, no slashes.
    ImportDirectory(String),
    /// A recipe of the catalogue, see `GET /v1/images/catalogue`.
    Catalogue(String),
}

/// What an upload says of itself in query parameters; the body is the bundle (tar).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UploadImage {
    /// Unique name.
    pub name: Name,
    /// SHA-256 of the whole stream, in lower-case hexadecimal.
    pub sha256: Option<String>,
    /// Length of the stream in bytes, where the caller says.
    pub length_bytes: Option<u64>,
}

/// A recipe that images can be built from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CatalogueEntry {
    /// Name to import by.
    pub name: String,
    /// One line for people.
    pub title: String,
    /// What is in it.
    pub description: String,
}
