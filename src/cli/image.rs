//! `toft image …`
use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand};
use model::Name;
use model::image::{CatalogueEntry, Image, ImagePlan, ImportImage, ImportSource, PatchImage};

use crate::error::Error;
use crate::output::{self, Row};
use crate::target::{self, ListOptions};
use crate::{Context, wait};

/// What can be done with images.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Build an image from the catalogue, or take one from the host's import directory.
    Import(Import),
    /// Send an image bundle (tar) to the host.
    Upload(Upload),
    /// List images.
    #[command(visible_alias = "ls")]
    List(ListOptions),
    /// Show one image.
    Show {
        /// Name or id.
        image: String,
    },
    /// Change an image's name, description or labels.
    Update {
        /// Name or id.
        image: String,
        /// New name.
        #[arg(long)]
        name: Option<Name>,
        /// New description.
        #[arg(long)]
        description: Option<String>,
        /// KEY=VALUE to set, KEY- to remove; may be given more than once.
        #[arg(long, value_parser = target::label_change)]
        label: Vec<(String, Option<String>)>,
    },
    /// Delete an image that no server uses.
    #[command(visible_alias = "rm")]
    Delete {
        /// Name or id.
        image: String,
    },
    /// List the recipes that images can be built from.
    Catalogue,
}

/// `toft image import`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("source").required(true)))]
pub(crate) struct Import {
    /// Unique name; the recipe's when absent.
    name: Option<Name>,
    /// A recipe of the catalogue, such as debian-12.
    #[arg(long, group = "source")]
    catalogue: Option<String>,
    /// An entry of the host's import directory.
    #[arg(long, group = "source")]
    from: Option<String>,
    /// SHA-256 the image's manifest must have.
    #[arg(long)]
    sha256: Option<String>,
    /// KEY=VALUE; may be given more than once.
    #[arg(long, value_parser = target::label)]
    label: Vec<(String, String)>,
    /// Say what would be imported, and import nothing.
    #[arg(long)]
    dry_run: bool,
}

/// `toft image upload`.
#[derive(Debug, Args)]
pub(crate) struct Upload {
    /// Unique name.
    name: Name,
    /// The bundle.
    file: PathBuf,
    /// SHA-256 the whole bundle must have.
    #[arg(long)]
    sha256: Option<String>,
}

impl Verb {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Verb::Import(import) => import.run(context).await,
            Verb::Upload(upload) => upload.run(context).await,
            Verb::List(options) => {
                let images: Vec<Image> = target::list(&context.client, "images", &options).await?;
                output::many(context.format, &images)
            }
            Verb::Show { image } => {
                let id = target::resolve(&context.client, "images", &image).await?;
                let image: Image = context.client.get(&format!("/v1/images/{id}")).await?;
                output::one(context.format, &image)
            }
            Verb::Update { image, name, description, label } => {
                let id = target::resolve(&context.client, "images", &image).await?;
                let labels = (!label.is_empty()).then(|| label.into_iter().collect());
                let patch = PatchImage { name, description, labels };
                let body = serde_json::to_vec(&patch).map_err(Error::Answer)?;
                let path = format!("/v1/images/{id}");
                let image: Image = context.client.send("PATCH", &path, Some(body), &[]).await?.json()?;
                output::one(context.format, &image)
            }
            Verb::Delete { image } => {
                let id = target::resolve(&context.client, "images", &image).await?;
                let answer = context.client.send("DELETE", &format!("/v1/images/{id}"), None, &[]).await?;
                wait::finish::<Image>(context, &answer, "images", true).await
            }
            Verb::Catalogue => {
                let entries: Vec<CatalogueEntry> =
                    target::pages(&context.client, "images/catalogue", &[], None).await?;
                output::many(context.format, &entries)
            }
        }
    }
}

impl Import {
    async fn run(self, context: &Context) -> Result<(), Error> {
        let name = match (&self.name, &self.catalogue) {
            (Some(name), _) => name.clone(),
            (None, Some(recipe)) => {
                recipe.parse().map_err(|_| Error::Usage("give the image a name".to_owned()))?
            }
            (None, None) => return Err(Error::Usage("give the image a name".to_owned())),
        };
        let source = match (self.catalogue, self.from) {
            (Some(recipe), _) => ImportSource::Catalogue(recipe),
            (None, from) => ImportSource::ImportDirectory(from.unwrap_or_default()),
        };
        let import = ImportImage { name, source, sha256: self.sha256, labels: target::labels(&self.label)? };
        let body = serde_json::to_vec(&import).map_err(Error::Answer)?;
        if self.dry_run {
            let path = "/v1/images?dry_run=true";
            let plan: ImagePlan = context.client.send("POST", path, Some(body), &[]).await?.json()?;
            return output::plan(context.format, &plan, &plan.image, &plan.steps);
        }
        let answer = context.client.send("POST", "/v1/images", Some(body), &[]).await?;
        wait::finish::<Image>(context, &answer, "images", false).await
    }
}

impl Upload {
    async fn run(self, context: &Context) -> Result<(), Error> {
        let (file, length) = target::open(&self.file)?;
        let file = tokio::fs::File::from_std(file);
        let mut path = format!("/v1/images?name={}", self.name);
        if let Some(sha256) = &self.sha256 {
            path.push_str(&format!("&sha256={}", target::percent_encode(sha256)));
        }
        let bar = wait::transfer_bar("upload", length);
        let shown = bar.clone();
        let on_progress = move |sent| shown.set_position(sent);
        let answer = context.client.upload(&path, "application/x-tar", file, length, on_progress).await;
        bar.finish_and_clear();
        wait::finish::<Image>(context, &answer?, "images", false).await
    }
}

impl Row for Image {
    const COLUMNS: &'static [&'static str] =
        &["NAME", "STATE", "DISK", "STORED", "USER", "TITLE", "CREATED", "ID"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.to_string(),
            output::word(&self.state),
            if self.disk_bytes == 0 { "-".to_owned() } else { output::bytes(self.disk_bytes) },
            output::bytes(self.stored_bytes),
            self.default_user.clone(),
            self.title.clone(),
            output::time(self.created_at),
            self.id.to_string(),
        ]
    }

    fn name(&self) -> String {
        self.name.to_string()
    }
}

impl Row for CatalogueEntry {
    const COLUMNS: &'static [&'static str] = &["NAME", "TITLE", "DESCRIPTION"];

    fn cells(&self) -> Vec<String> {
        vec![self.name.clone(), self.title.clone(), self.description.clone()]
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}
