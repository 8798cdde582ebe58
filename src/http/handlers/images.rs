//! `/v1/images`.
use axum::extract::{FromRequest, FromRequestParts, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use model::image::{CatalogueEntry, Image, ImagePlan, ImportImage, PatchImage, UploadImage};
use model::operation::Accepted;
use model::page::Page;
use model::{ImageId, Name};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::answer;
use crate::body;
use crate::call::{Head, Json, Mutation, Patch, Removable};
use crate::error::Failure;
use crate::page::Fields;
use crate::path::Id;
use crate::query::{ListParameters, NameParameters, NoParameters, OneParameters, Query};
use crate::routes::{Api, Slot};
use crate::upload::{self, Upload};

/// Lists images.
#[utoipa::path(get, path = "/v1/images", tag = "images", operation_id = "list_images", params(ListParameters),
    responses((status = 200, description = "One page.", body = Page<Image>)))]
pub(crate) async fn list(
    State(api): State<Api>,
    Query(parameters): Query<ListParameters>,
) -> Result<Response, Failure> {
    let (query, fields) = parameters.checked()?;
    let fields = Fields::of::<Image>(fields.as_deref())?;
    answer::page(&api.host.images().list(query).await?, fields.as_ref())
}

/// What an upload says of itself.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct UploadParameters {
    /// Unique name; needed with `application/x-tar`, and not with JSON, where the body has it.
    #[param(inline)]
    name: Option<Name>,
    /// SHA-256 of the whole body in lower-case hexadecimal; only with `application/x-tar`.
    #[param(pattern = "^[0-9a-f]{64}$")]
    sha256: Option<String>,
    /// Answer what would be imported, or the problem it would fail with, and import nothing; only with JSON.
    dry_run: Option<bool>,
}

/// Imports an image: a bundle sent as the body (`application/x-tar`), or a source named in JSON.
#[utoipa::path(post, path = "/v1/images", tag = "images", operation_id = "import_image", params(UploadParameters),
    request_body(content((ImportImage = "application/json"), (Vec<u8> = "application/x-tar"))),
    responses(
        (status = 200, description = "With `dry_run`: what would be imported.", body = ImagePlan),
        (status = 201, description = "With `Prefer: wait`: it is ready.", body = Accepted<Image>),
        (status = 202, description = "It is being imported.", body = Accepted<Image>),
    ))]
pub(crate) async fn create(
    State(api): State<Api>,
    Query(parameters): Query<UploadParameters>,
    request: Request,
) -> Result<Response, Failure> {
    body::expect_type(request.headers(), &["application/json", "application/x-tar"])?;
    if body::content_type(request.headers()).as_deref() == Some("application/x-tar") {
        upload(api, parameters, request).await
    } else {
        import(api, parameters, request).await
    }
}

async fn import(api: Api, parameters: UploadParameters, request: Request) -> Result<Response, Failure> {
    if parameters.name.is_some() || parameters.sha256.is_some() {
        let name = if parameters.name.is_some() { "name" } else { "sha256" };
        return Err(Failure::parameter(name, "conflict", "with a JSON body, say it in the body"));
    }
    let Mutation { call, body: Json(spec), wait } =
        Mutation::<Json<ImportImage>>::from_request(request, &()).await?;
    let host = api.host.clone();
    if parameters.dry_run == Some(true) {
        return answer::plain(&host.images().plan(&call, spec).await?);
    }
    let begun = answer::undisturbed(async move { Ok(host.images().import(&call, spec).await?) }).await?;
    answer::accepted(&api, begun, wait, StatusCode::CREATED, |image| fresh(&api, image)).await
}

async fn upload(api: Api, parameters: UploadParameters, request: Request) -> Result<Response, Failure> {
    if parameters.dry_run == Some(true) {
        let detail = "a bundle is known only when it has been sent; use it with a source named in JSON";
        return Err(Failure::parameter("dry_run", "conflict", detail));
    }
    let Some(name) = parameters.name else {
        return Err(Failure::parameter(
            "name",
            "missing",
            "say what the image is to be called, as in ?name=web",
        ));
    };
    let sound = |sha256: &String| {
        sha256.len() == 64 && sha256.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    if parameters.sha256.as_ref().is_some_and(|sha256| !sound(sha256)) {
        return Err(Failure::parameter("sha256", "not_valid", "use 64 lower-case hexadecimal digits"));
    }
    let (mut parts, body) = request.into_parts();
    let Head { call, wait } = Head::from_request_parts(&mut parts, &()).await?;
    let length_bytes = upload::check_length(&parts.headers)?;
    let place = api.take(Slot::Upload)?;
    let spec = UploadImage { name, sha256: parameters.sha256, length_bytes };
    let host = api.host.clone();
    let begun = answer::undisturbed(async move {
        let begun = host.images().upload(&call, spec, Upload::new(body)).await?;
        drop(place);
        Ok(begun)
    })
    .await?;
    answer::uploaded(&api, begun, wait, |image| fresh(&api, image)).await
}

/// Lists recipes that images can be imported from.
#[utoipa::path(get, path = "/v1/images/catalogue", tag = "images", operation_id = "list_catalogue",
    params(NameParameters), responses((status = 200, description = "One page.", body = Page<CatalogueEntry>)))]
pub(crate) async fn catalogue(
    State(api): State<Api>,
    Query(parameters): Query<NameParameters>,
) -> Result<Response, Failure> {
    let (query, fields) = parameters.checked()?;
    let fields = Fields::of::<CatalogueEntry>(fields.as_deref())?;
    answer::page(&api.host.images().catalogue(query).await?, fields.as_ref())
}

/// Reads an image.
#[utoipa::path(get, path = "/v1/images/{id}", tag = "images", operation_id = "read_image",
    params(("id" = ImageId, Path, description = "The image."), OneParameters),
    responses((status = 200, description = "The image.", body = Image)))]
pub(crate) async fn one(
    State(api): State<Api>,
    Id(id): Id<ImageId>,
    Query(parameters): Query<OneParameters>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    answer::one(&api.host.images().one(id).await?, parameters.fields.as_deref(), &headers)
}

impl Removable for PatchImage {
    const DEFAULTS: &'static [(&'static str, &'static str)] = &[("description", "\"\"")];
}

/// Changes an image by an RFC 7396 merge patch: its name, its description, its labels.
#[utoipa::path(patch, path = "/v1/images/{id}", tag = "images", operation_id = "update_image",
    params(("id" = ImageId, Path, description = "The image.")),
    request_body(content((PatchImage = "application/merge-patch+json"), (PatchImage = "application/json"))),
    responses((status = 200, description = "The image as changed.", body = Image)))]
pub(crate) async fn patch(
    State(api): State<Api>,
    Id(id): Id<ImageId>,
    _: Query<NoParameters>,
    Mutation { call, body: Patch(patch), .. }: Mutation<Patch<PatchImage>>,
) -> Result<Response, Failure> {
    let changed =
        answer::undisturbed(async move { Ok(api.host.images().patch(&call, id, patch).await?) }).await?;
    answer::changed(&changed)
}

/// Deletes an image that nothing needs.
#[utoipa::path(delete, path = "/v1/images/{id}", tag = "images", operation_id = "delete_image",
    params(("id" = ImageId, Path, description = "The image.")),
    responses(
        (status = 200, description = "With `Prefer: wait`: it is deleted.", body = Accepted<Image>),
        (status = 202, description = "It is being deleted.", body = Accepted<Image>),
    ))]
pub(crate) async fn delete(
    State(api): State<Api>,
    Id(id): Id<ImageId>,
    _: Query<NoParameters>,
    Mutation { call, wait, .. }: Mutation<()>,
) -> Result<Response, Failure> {
    let host = api.host.clone();
    let deleted = answer::undisturbed(async move { Ok(host.images().delete(&call, id).await?) }).await?;
    answer::accepted(&api, deleted, wait, StatusCode::OK, answer::gone).await
}

/// The image as it is at the end of the work.
async fn fresh(api: &Api, image: Image) -> Option<Image> {
    api.host.images().one(image.id).await.ok()
}
