//! The description of the API, OpenAPI 3.1: the routes describe themselves, here is what they have in common.

use utoipa::openapi::path::Operation;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::tag::TagBuilder;
use utoipa::openapi::{
    Components, ContentBuilder, InfoBuilder, LicenseBuilder, OpenApi, OpenApiBuilder, Ref, ResponseBuilder,
};
use utoipa::{PartialSchema, ToSchema};

use crate::error::ErrorBody;

pub(crate) mod answers;

const TAGS: [(&str, &str); 7] = [
    ("generate", "Answers and embeddings, as OpenAI's API."),
    ("anthropic", "Anthropic's API."),
    ("models", "What can be asked for."),
    ("tokens", "Text and tokens."),
    ("cache", "The prefix cache, as whoever asks sees it."),
    ("analysis", "What requests read inside the model."),
    ("server", "Health and figures."),
];

/// Everything but the routes.
pub(crate) fn start() -> OpenApi {
    let info = InfoBuilder::new()
        .title("antefix")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some("An LLM server for CPUs: many users behind shared prompts."))
        .license(Some(LicenseBuilder::new().name("MIT OR Apache-2.0").build()))
        .build();
    let mut components = Components::new();
    components.add_security_scheme(
        "key",
        SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build()),
    );
    components
        .schemas
        .insert(ErrorBody::name().into_owned(), ErrorBody::schema());
    let tags = TAGS.map(|(name, text)| TagBuilder::new().name(name).description(Some(text)).build());
    OpenApiBuilder::new()
        .info(info)
        .components(Some(components))
        .tags(Some(tags))
        // A server without keys lets everybody in.
        .security(Some([
            SecurityRequirement::new("key", [] as [&str; 0]),
            SecurityRequirement::default(),
        ]))
        .build()
}

/// Adds what all routes have: a name of their own, and the answer that each can give, an error.
pub(crate) fn finish(api: &mut OpenApi) {
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name(ErrorBody::name())))
        .build();
    let error = ResponseBuilder::new()
        .description("An error; on Anthropic's routes in Anthropic's shape")
        .content("application/json", content)
        .build();
    for (path, item) in &mut api.paths.paths {
        let operations: [(&str, &mut Option<Operation>); 3] = [
            ("get", &mut item.get),
            ("post", &mut item.post),
            ("delete", &mut item.delete),
        ];
        for (method, operation) in operations {
            let Some(operation) = operation else { continue };
            // Handlers of different modules share their names: `post_v1_embeddings` is unique.
            let words: Vec<&str> = path
                .split(|c: char| !c.is_alphanumeric())
                .filter(|w| !w.is_empty())
                .collect();
            operation.operation_id = Some(format!("{method}_{}", words.join("_")));
            let responses = &mut operation.responses.responses;
            responses.insert("default".into(), error.clone().into());
        }
    }
}
